"""Every known way to lose a night, looked for before the GPU hours are spent: one small check a function."""

"""The Optuna study: space, sampler, storage, finalists, budget."""

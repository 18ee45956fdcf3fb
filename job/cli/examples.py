"""Examples at the end of the commands' help, without the command itself."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "run": (
        "Qwen/Qwen3-8B --upload file:///mnt/models/edited",
        "path/to/model --bad-prompts bad.txt --good-prompts good.txt --device cuda:1 --max-hours 90m",
        "Qwen/Qwen3-8B --checkpoint hf://me/state --upload hf://me/edited --max-cost 5 --price 0.4",
        "--reproduce reproduce.json",
    ),
    "resume": (
        "",
        "--checkpoint s3://bucket/jobs --upload hf://me/edited",
        "--trials 400",
    ),
    "preflight": (
        "Qwen/Qwen3-8B",
        "Qwen/Qwen3-8B --on 1xRTX4090 --json > plan.json",
    ),
    "status": (
        "--watch",
        "--checkpoint hf://me/state --json",
    ),
    "front": (
        "",
        '--json | jq ".[].number"',
    ),
    "report": (
        "",
        "--picture result.png",
        "--include-responses",
    ),
    "chat": (
        "",
        '--trial 41 --prompt "What is the capital of France?"',
        "--system 'Be brief.' --tokens 100 --json > answers.jsonl",
    ),
    "evaluate": (
        "--trial 41",
        "path/to/edited --against Qwen/Qwen3-8B",
        "mine someone/theirs --against Qwen/Qwen3-8B",
        "--tasks quick --out measured.json",
        "model-Q4_K_M.gguf --against Qwen/Qwen3-8B --max-kl 0.1 --max-refusals 5 --upload hf://me/model-GGUF",
    ),
    "export": (
        "--trial 41",
        "--format directions",
    ),
    "upload": (
        "--upload hf://me/edited",
        "--trial 41 --format adapter --upload s3://bucket/edited",
    ),
    "apply": ("Qwen/Qwen3-8B edit.safetensors edited-model",),
    "inspect": (
        "Qwen/Qwen3-8B",
        "path/to/model --json",
    ),
    "demo-model": ("organism --arch gemma2",),
    "real-model": ("runs/real-model",),
    "demo": ("--workspace demo --trials 20",),
    "config show": (
        "",
        "--config job.toml --set search.space=field",
    ),
    "cloud offers": (
        "--on 1xRTX4090 --interruptible",
        "--preflight plan.json --max-price 0.5",
    ),
    "cloud launch": (
        "--on 1xRTX4090 --env HF_TOKEN -- run me/model --upload hf://me/edited --when-done destroy",
        "--on 1xRTX4090 --dry-run -- run me/model --when-done destroy",
    ),
    "cloud watch": (
        "abliterate-1a2b --relaunches 5 --max-total 20",
        "abliterate-1a2b --json > watch.jsonl",
    ),
    "cloud fetch": ("abliterate-1a2b logs",),
    "cloud destroy": ("abliterate-1a2b --yes",),
}

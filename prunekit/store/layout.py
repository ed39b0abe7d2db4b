"""Names of files and folders on disk; no other module spells them out."""

STORE = ".stages"
"""Folder of stage results, beside the run folders that share it."""

STORE_FORMAT = 3
"""Version of the store, which keeps the stages of each version in a folder of its own."""

RUN_FORMAT = 2
"""Version of run.json and plan.json."""

RUN, PLAN, RECIPE = "run.json", "plan.json", "recipe.toml"
MODEL, RECORDS = "model.safetensors", "records.npz"
RESULT, PROGRESS, SCRATCH = "result.json", "progress.safetensors", "scratch"
EVALUATIONS = "evaluations"
"""Folder in a run's folder, for the results of `prunekit eval`."""

RUN_LOCK, STAGE_LOCK = ".lock", "lock"

"""Names of what is on disk: nobody else writes them down."""

STORE = ".stages"
"""Folder of stage results, beside the run folders that share it."""

STORE_FORMAT = 2
"""Version of the store; results of each lie in a folder of their own in it."""

RUN_FORMAT = 1
"""Version of run.json and plan.json."""

RUN, PLAN, RECIPE = "run.json", "plan.json", "recipe.toml"
MODEL, RECORDS = "model.safetensors", "records.npz"
RESULT, PROGRESS, SCRATCH = "result.json", "progress.safetensors", "scratch"
EVALUATIONS = "evaluations"
"""Folder of a run with what `prunekit eval` found of its network."""

RUN_LOCK, STAGE_LOCK = ".lock", "lock"

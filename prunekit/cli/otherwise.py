"""What other tools call a command or an option, and what to write instead."""

from __future__ import annotations

import re

import click

from prunekit.errors import suggest

OTHERWISE = {
    "train": "run", "start": "run", "resume": "run", "prune": "run", "finetune": "run",
    "evaluate": "eval", "test": "eval", "attack": "eval", "validate": "check", "lint": "check",
    "compare": "results", "report": "results", "ls": "list", "info": "show", "describe": "show",
    "create": "init", "plot": "curve", "gc": "clean", "convert": "import", "load": "import",
    "--gpu": "--device cuda", "--cuda": "--device cuda", "--cpu": "--device cpu",
    "--output": "--out FOLDER", "--name": "--out FOLDER", "--overwrite": "--force",
    "--seed": "--set seed=1", "--epochs": "--set pretrain.epochs=10",
    "--lr": "--set pretrain.optimizer.lr=0.1", "--sparsity": "--set prune.sparsity=0.95",
    "--eps": "--set threat.eps=8/255", "--batch-size": "--set dataset.batch_size=64",
    "--pruner": "--set prune.pruner=lwm", "--dataset": "--set dataset=cifar10",
    "--model": "--set architecture=vgg16-bn", "--evaluators": "--with clean,pgd",
}  # fmt: skip
"""What other tools call a command or an option -> what to write here."""


NEEDLESS = {
    "--resume": "the same command again goes on where it was stopped",
    "--continue": "the same command again goes on where it was stopped",
    "--verbose": "what happens is printed anyway; prunekit --debug shows the traceback of an error",
    "-v": "what happens is printed anyway; prunekit --debug shows the traceback of an error",
    "--quiet": "add 2>/dev/null; results alone go to stdout",
}
"""Options of other tools -> why there is none here."""


def point_to_option(error: click.NoSuchOption) -> click.UsageError:
    """The error of an option that there is not, with what to write instead."""
    word, command = error.option_name.replace("_", "-"), error.ctx and error.ctx.command
    known = [way for p in command.params for way in p.opts if way[:2] == "--"] if command else []
    meant = OTHERWISE.get(word, "")
    if word in NEEDLESS:
        advice = NEEDLESS[word]
    elif meant.partition(" ")[0] in known:
        advice = f"write {meant}"
    else:
        advice = suggest(word.removeprefix("--"), [way.removeprefix("--") for way in known])
        advice = re.sub(r"([\w-]+)(?=['?,]|$)", r"--\1", advice)
    return click.UsageError(f"there is no option {error.option_name!r}; {advice}", error.ctx)

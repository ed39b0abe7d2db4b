"""The fold over stages: computing, evaluating, rehearsing, previewing."""

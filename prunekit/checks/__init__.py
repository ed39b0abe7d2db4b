"""What components must do, kind by kind: the contract test behind `prunekit.testing`."""

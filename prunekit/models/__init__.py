"""Networks: built, stored, imported, exported, handed over from Python."""

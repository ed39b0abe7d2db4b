"""The only training loop: what it trains, and where it runs."""

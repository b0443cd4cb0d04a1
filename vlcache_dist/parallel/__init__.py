"""Tensor-parallel workers: one leader, the worker as everybody knows it, and followers that do what it does on their
shards. ``docs/architecture.md`` states the contract."""

"""The authority: the only holder of keys, budgets, approvals and the log. One process, outside Ray."""

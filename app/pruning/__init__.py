"""What pruning removes, in integers: ties, budgets, numbers of zeros; imports app.network and app.spec, never torch."""

"""The tests mirror the tree; `reference` holds slow, obvious twins of the fast paths."""

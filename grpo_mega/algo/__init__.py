"""The algorithm's own arithmetic: advantages, objectives and weightings."""

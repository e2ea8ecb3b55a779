"""From a run folder to figures with labels, and from figures to tables, JSON and a curve."""

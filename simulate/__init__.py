"""The engine: schemas, cost formulas, clock and methods. It never imports ltecli."""

"""The shapes of answers, stated once: whoever answers takes fields and order from here. Imports the job language only."""

"""ONE FILE PER METHOD, and what all of them share: encode, fit, guard, losses."""

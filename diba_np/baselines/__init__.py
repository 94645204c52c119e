"""Other methods, one file each, for comparisons at equal stored bits."""

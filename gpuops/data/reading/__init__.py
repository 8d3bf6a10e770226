"""From sample ids to filled slots: where chunks lie, ranged reads, decoding, and what is held."""

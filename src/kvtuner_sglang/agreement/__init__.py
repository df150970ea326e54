"""Whether two servers answer alike: the same greedy requests put to both, and how far their answers are apart."""

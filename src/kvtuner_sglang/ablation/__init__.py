"""The seed's planned ablation, published: what formats and topologies hold and how fast they answer, in one table."""

"""A page of HTML about evaluated runs: recalls, ranks, scores, and the hardest queries with the attention of their pairs."""

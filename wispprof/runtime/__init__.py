"""The split runtime: verification server, edge client, and what runs between them."""

"""The one trainer that every family shares: small Lightning callbacks, one concept each."""

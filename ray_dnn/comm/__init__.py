"""How agents reach each other: a mesh of stream sockets, and the exchange along the fixed tree on top of it."""

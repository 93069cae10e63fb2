"""How values cross from client to client."""

"""How configurations are declared."""

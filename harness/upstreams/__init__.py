"""How an upstream is spoken to: one package an upstream."""

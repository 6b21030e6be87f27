"""Speed, measured beside peers in the same run. Absolute times of a shared machine mean little; read the ratios."""

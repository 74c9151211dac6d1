"""Faults injected into real runs: kills, stops and signals at chosen moments."""

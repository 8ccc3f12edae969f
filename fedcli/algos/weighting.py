"""How much an update counts in the mean."""


def by_num_samples(num_samples: int) -> float:
    """Weigh a client by the number of its rows: n_k, McMahan et al. 2017."""
    return float(num_samples)


def uniform(num_samples: int) -> float:
    """Weigh all clients alike, as OpenFedLLM's adaptive servers do."""
    return 1.0

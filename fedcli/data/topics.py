"""Topics of texts without labels: k-means over TF-IDF, so that they can be split unevenly."""

import numpy as np
from numpy.typing import NDArray

from fedcli.errors import ConfigError
from fedcli.randomness import stream, stream_seed

NUM_FITTED = 50_000
"""Texts that the clusters are fitted to, at random where there are more; all are assigned."""
NUM_TERMS = 20_000
NUM_SHOWN = 3
CHUNK = 10_000


def find_topics(texts: list[str], num_topics: int, seed: int) -> tuple[list[str], NDArray[np.int64]]:
    """Return the topics' names, by their heaviest terms, and every text's topic.

    Raises ConfigError where the texts are too few, or have no words.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    chosen = stream(seed, "topics").permutation(len(texts))[:NUM_FITTED]
    vectorizer = TfidfVectorizer(max_features=NUM_TERMS, sublinear_tf=True, stop_words="english", dtype=np.float32)
    try:
        vectors = vectorizer.fit_transform(texts[index] for index in chosen)
    except ValueError as error:  # an empty vocabulary
        raise ConfigError(
            f"data.partition: the rows have no words to find topics by ({error})", hint="Use by: length, or a column."
        ) from error
    if vectors.shape[0] < num_topics:
        raise ConfigError(
            f"data.partition: {num_topics} topics of {vectors.shape[0]} rows cannot be made", hint="Lower topics."
        )
    state = stream_seed(seed, "topics") % 2**32
    means = MiniBatchKMeans(num_topics, random_state=state, batch_size=4096, n_init=3).fit(vectors)
    parts = [means.predict(vectorizer.transform(texts[start : start + CHUNK])) for start in range(0, len(texts), CHUNK)]
    terms = vectorizer.get_feature_names_out()
    names = [
        f"topic {number}: " + ", ".join(terms[center.argsort()[::-1][:NUM_SHOWN]])
        for number, center in enumerate(means.cluster_centers_)
    ]
    return names, np.concatenate(parts).astype(np.int64)

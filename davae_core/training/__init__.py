"""Training: the autoencoder (stage 1), the adapter (stage 2), and what the tiny models need besides.

Everything here needs the ``train`` extra of this package; nothing that runs in the graph imports it.
"""

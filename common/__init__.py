"""What the scripts share: one file, one thing.

Training
    ``training_options`` (command line), ``devices``, ``start`` (at a checkpoint or at the
    beginning), ``discriminants`` (initial embedding), ``module`` (the steps of several devices and
    workers), ``grouped_updater``, ``vectorized`` (layers in faster forms), ``averaging``,
    ``monitoring``.
Several processes
    ``launcher`` (on this machine), ``distributed``.
Files of a run
    ``checkpoints``; below it ``checkpoint_files``, ``symbol_file``, ``array_file``,
    ``former_checkpoints``; ``data_facts``, ``log_file``, ``versions``.
A trained network
    ``embedder``, ``evaluation``, ``pictures``, ``curves``; ``images`` and ``image_files`` of one's
    own.
Data
    ``idx``, ``download``.
Everything
    ``environment`` (imports MXNet), ``mxnet_build``, ``command_line``, ``errors``, ``files``.
"""

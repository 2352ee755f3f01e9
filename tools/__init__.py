"""Programs beside the main workflow, run as ``python -m tools.NAME``.

With a trained network
    ``demo`` (with ``demo_server``, ``demo.html``), ``embed``, ``export``.
The results of the documentation
    ``reproduce``, with ``experiments`` (what is trained), ``runs`` and ``arrangement``; ``tables``,
    with ``table_kinds``; ``torch_recipe``.
Speed
    ``benchmark``, with ``benchmark_torch`` and ``operator_forms``; ``benchmark_devices``,
    ``many_classes``; ``measuring``, which they share.
"""

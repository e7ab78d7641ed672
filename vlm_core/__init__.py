"""Observe, change and measure vision-language models through one seam.

>>> from vlm_core import ZeroHeads, load_vlm, sweep
>>> subject = load_vlm("fixtures/embedded/vlm")                                   # doctest: +SKIP
>>> table = sweep(subject, items, {"full": None, "cut": ZeroHeads([(3, 1)])})         # doctest: +SKIP

``vlm_core.stats`` needs no torch; names below load their modules on first use, so importing it stays cheap.
"""

from importlib import import_module

_HOMES = {
    "subjects.activations": ("capture_activations", "capture_embeddings", "capture_image_kv", "mean_token", "token_spread"),
    "families.adapters": ("lora_targets",),
    "families.anatomy": ("Anatomy", "HeadId"),
    "families.family": ("FAMILIES", "Family", "declare"),
    "subjects.checkpoint": ("Checkpoint", "inspect_checkpoint", "precheck_subject"),
    "errors": ("NotMeasurable", "SubjectError"),
    "evaluation": ("accuracy_table", "evaluate"),
    "reduction.keeping": ("keep_tokens",),
    "reduction.recipe": ("Recipe",),
    "reduction.horizon": ("InformationHorizon", "information_horizon"),
    "reduction.image_groups": ("ImageGroups", "image_groups"),
    "reduction.kept_rows": ("KeptRows", "kept_rows"),
    "reduction.redundancy": ("Redundancy", "redundancy"),
    "reduction.utility": ("MarginalUtility", "marginal_utility"),
    "heads.attribution": ("HeadAttribution", "head_attribution"),
    "heads.curves": ("recovery",),
    "heads.features": ("HeadFeatures", "head_features"),
    "heads.grid": ("ablation_grid",),
    "heads.impact": ("HeadImpact", "head_impact", "layer_ranking"),
    "heads.localisation": ("LocalisationHeads", "localisation_heads"),
    "heads.placebo": ("placebo_losses",),
    "heads.probing": ("groundedness", "held_out"),
    "heads.rankings": ("attention_mass", "gradient_gates", "without_each_head"),
    "heads.report": ("HeadReport", "head_report"),
    "heads.semantics": ("compare_labels",),
    "heads.token_mass": ("TokenMass", "token_mass"),
    "heads.taxonomy": ("Taxonomy", "categorise", "cluster_heads", "path_effects"),
    "interventions": (
        "Activations",
        "DropTokens",
        "GaussianNoise",
        "HeadDirections",
        "HeadMeans",
        "ImageKV",
        "ImageKVMeans",
        "KnockOut",
        "MeanHeads",
        "MergeTokens",
        "Patch",
        "RedirectHeads",
        "ReplaceImageKV",
        "ReplaceTokens",
        "ResampleHeads",
        "Steer",
        "Touch",
        "Vector",
        "ZeroHeads",
        "describe",
        "touches",
    ),
    "interventions.stored": ("load_interventions", "save_interventions"),
    "observation.gradients": ("HeadGradients", "ImageGradients", "IntegratedGradients"),
    "families.layout": ("Layout", "coverage", "heatmap", "image_layouts", "object_tokens"),
    "observation.lens": ("DirectLogits", "LogitLens"),
    "observation.means": ("KeyValues", "Moments", "head_means", "image_kv_means", "key_value_moments"),
    "observation.at": ("At",),
    "observation.attention": ("AttentionEntropy", "AttentionMass", "FullAttention", "TopTokens"),
    "observation.image_attention": ("ImageAttention", "MaskIoU", "TopShare"),
    "observation.likeness": ("TokenLikeness",),
    "observation.observing": ("attention_heatmap", "attention_map", "observe"),
    "observation.position": ("RelativeDistance", "RotaryBias"),
    "observation.outputs": ("HeadOutputs", "HiddenStates"),
    "recording": ("Recording", "record"),
    "observation.recording_config": ("RecordingConfig",),
    "observation.sinks": ("SinkMass", "Sinks", "find_sinks"),
    "subjects.batch": ("Batch",),
    "subjects.checks": ("selfcheck",),
    "subjects.load": ("load_vlm",),
    "subjects.subject": ("Subject",),
    "tracing.background": ("without_object",),
    "tracing.patching": ("activation_patching", "contrasting"),
    "tracing.places": ("token_places",),
    "tracing.sequence": ("arrivals",),
    "tracing.windows": ("depth_windows", "knock_out_windows"),
    "sweeps.executors": ("ProcessExecutor", "RayExecutor", "SerialExecutor"),
    "sweeps.sweep": ("progress_bar", "sweep"),
    "tracing.lens_tracks": ("LensTracks", "lens_tracks"),
    "tracing.object_tokens": ("ObjectTokens", "replace_object_tokens"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vlm_core' has no attribute '{name}'")
    return getattr(import_module(f"vlm_core.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__

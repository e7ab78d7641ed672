"""H1: the heads of highest attribution, one by one.

No claim is decided here. Heads are chosen on discovery items; what is said of each was measured on confirmation items: what the answer loses
when this head alone no longer sees the image, and where its attention falls.
"""

from functools import partial

from probes import target_mask
from reports import heads
from vlm_core import head_report
from vlm_core.heads.features import FEATURES
from vlm_core.heads.report import LOOKS


def test_what_the_top_heads_do_and_look_at(
    subject, probes, profile, image_means, pooled_attribution, seen_features, taxonomy, sweeps, evidence
):
    items = probes.some("confirmation", profile.map_items)
    alone = partial(sweeps, "removing the image from each reported head")
    found = seen_features("confirmation")
    report = head_report(subject, items, image_means, pooled_attribution, found, taxonomy, masks=target_mask, measure=alone)
    heads.leave(evidence, report, items, FEATURES | LOOKS)
    for head in report.heads:
        assert head["effect"]["margin"]["value"] is not None, f"{head['name']} has no causal evidence"
        assert head["features"]["answer_to_image"]["value"] is not None, f"{head['name']} has no diagnostic evidence"

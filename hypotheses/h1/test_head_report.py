"""H1: the heads of highest attribution, one by one.

No claim is decided here. Heads are chosen on discovery items; what is said of each was measured on confirmation items: what the answer loses
when this head alone no longer sees the image, and where its attention falls. A head has causal evidence only where the interval of what is lost
excludes 0; how many heads have that and a measured look is a result, which the report says, not a condition of there being one.
"""

from functools import partial

from probes import target_mask
from reports import heads
from vlm_core import head_report
from vlm_core.heads.features import FEATURES
from vlm_core.heads.report import ENOUGH, LOOKS


def test_what_the_top_heads_do_and_look_at(
    subject, probes, profile, image_means, pooled_attribution, seen_features, taxonomy, sweeps, evidence
):
    items = probes.some("confirmation", profile.map_items)
    alone = partial(sweeps, "removing the image from each reported head")
    found = seen_features("confirmation")
    report = head_report(subject, items, image_means, pooled_attribution, found, taxonomy, masks=target_mask, measure=alone)
    heads.leave(evidence, report, items, FEATURES | LOOKS)
    for head in report.heads:
        assert head["effect"]["margin"]["value"] is not None, f"what head {head['name']} does was not measured"
        assert head["features"]["answer_to_image"]["value"] is not None, f"what head {head['name']} looks at was not measured"
    assert report.about["both"] >= ENOUGH or report.about["shortfall"], "too few heads with both kinds of evidence, and the report is silent"

"""The works whose claims the suite tests: what each says, on what evidence, about which models, and where our knowledge of it comes from.

``WORKS``   twelve works, in the order of the hypotheses
``tested``  which of some declared claims rest on a work

What is tested of a work follows from the declared ``source`` of each claim, so that a matrix made from both cannot drift.
"""

from __future__ import annotations

from dataclasses import dataclass

SUMMARY = "a summary of the paper"
ABSTRACT = "the paper's abstract"
CODE = "the public code"
SECONDARY = "secondary notes, not checked against the paper"


@dataclass(frozen=True)
class Work:
    """One published work.

    Attributes
    ----------
    name : str
        How the field calls it.
    authors : str
        First author and year.
    where : str
        arXiv id.
    cited : tuple of str
        What a claim's ``source`` says when it rests on this work: any of these.
    claim, evidence, subject : str
        What was claimed, what was measured, and on which models and data.
    known_from : str
        Where these three lines come from.
    differs : str
        What is different here, for whoever compares the numbers.
    """

    name: str
    authors: str
    where: str
    cited: tuple[str, ...]
    claim: str
    evidence: str
    subject: str
    known_from: str
    differs: str

    @property
    def url(self) -> str:
        """The paper's page."""
        return f"https://arxiv.org/abs/{self.where.removeprefix('arXiv:')}"

    def cited_in(self, source: str) -> bool:
        """Whether a claim's declared source names this work."""
        return any(mark in source for mark in self.cited)


WORKS = (
    Work(
        name="Head attribution (HeAr)",
        authors="Kim et al. 2025",
        where="arXiv:2509.17588",
        cited=("2509.17588",),
        claim="A small, consistent set of attention heads in the middle and later layers carries most of the flow from image to text; what is shown "
        "decides which ones, not how it looks. Image attention does not tell them. Text arrives before the image; background tokens carry image information too.",
        evidence="A linear model of the answer's logit over random sets of heads whose image keys and values were replaced by their mean: faithfulness "
        "above 0.8 and completeness below 0.2 with fewer heads than other rankings. 80 % of single-head ablations change the logit by less than 5 %.",
        subject="Ten models (LLaVA-1.5, LLaVA-NeXT, InternVL2.5, Qwen2-VL), 200 COCO images, object identification; the 80 % are LLaVA-1.5-7B",
        known_from=SUMMARY,
        differs="The exact formulas, mask count and regulariser are not public: ours are reconstructed and judged by how well they predict unseen masks.",
    ),
    Work(
        name="Object tokens and the logit lens",
        authors="Neo et al., ICLR 2025",
        where="arXiv:2410.07149",
        cited=("2410.07149", "Neo et al."),
        claim="What an object is lies in its own image tokens, which become readable as words with depth, and is extracted at the last token.",
        evidence="Object identification falls by more than 70 % when the object's tokens are replaced by the mean token; attention cut in windows of layers.",
        subject="LLaVA 1.5 and others, COCO",
        known_from=SUMMARY,
        differs="Windows of layers are scaled to the subject's depth; objects are shapes of known place, not photographed ones.",
    ),
    Work(
        name="Cross-modal information flow",
        authors="Zhang et al., CVPR 2025",
        where="arXiv:2411.18620",
        cited=("2411.18620",),
        claim="The image reaches the question in two stages, generally in lower layers and about the asked objects in middle ones; the question reaches the "
        "last token in higher layers.",
        evidence="Attention knock-out between token groups, layer by layer.",
        subject="Models of the LLaVA series, visual question answering",
        known_from=ABSTRACT,
        differs="Which window hurts most is chosen on discovery scenes and confirmed on others.",
    ),
    Work(
        name="Head Impact",
        authors="Sergeev & Kotelnikov 2025",
        where="arXiv:2511.23375",
        cited=("2511.23375",),
        claim="Heads whose attention overlaps the key object matter for image understanding; low-rank tuning of the layers that have most of them helps most.",
        evidence="Head Impact differs between layers (Kruskal-Wallis p < 0.001), not within (p > 0.05). Tuning the top four layers: perplexity 9.85 to 8.88, 13.74 "
        "to 12.89, 17.20 to 15.39; of the bottom four or random four, negligible.",
        subject="PaliGemma2, Qwen2-VL, SmolVLM (2 to 3 billion parameters), image captioning",
        known_from=SUMMARY,
        differs="Gain is accuracy at equal parameters and steps, several seeds; objects' masks are known, not segmented by another model.",
    ),
    Work(
        name="Localisation heads",
        authors="Kang et al., CVPR 2025",
        where="arXiv:2503.06287",
        cited=("2503.06287", "Kang et al., CVPR 2025"),
        claim="A few heads of a frozen model know where a described object is: three are enough to localise it without training.",
        evidence="Localisation that competes with methods that need fine-tuning. Heads are chosen by how much they attend to the image and how compactly, and by how often "
        "that holds over a set.",
        subject="LLaVA-1.5 and others, RefCOCO",
        known_from=f"{ABSTRACT}, {CODE}",
        differs="Their overlap with the asked object is compared with that of random heads of the same layers.",
    ),
    Work(
        name="FastV",
        authors="Chen et al. 2024",
        where="arXiv:2403.06764",
        cited=("2403.06764",),
        claim="After layer 2 of 32, half of the visual tokens can go at no cost.",
        evidence="45 % of the operations of LLaVA-1.5-13B saved without loss over several tasks; tokens are kept by the attention that they get in the layer before.",
        subject="LLaVA-1.5, QwenVL-Chat, Video-LLaVA",
        known_from=f"{ABSTRACT}, {CODE}",
        differs="Policy and layer are chosen on discovery scenes; time is measured beside operations.",
    ),
    Work(
        name="PyramidDrop",
        authors="Xing et al. 2024",
        where="arXiv:2410.17247",
        cited=("2410.17247",),
        claim="In shallow layers every visual token is needed; redundancy grows with depth, so tokens can go in stages.",
        evidence="40 % of the training time and 55 % of the operations saved at comparable performance. Stages at 1/4, 1/2 and 3/4 of the depth keep 1/2, 1/4 and 1/8 of "
        "the tokens, ranked by the last instruction token.",
        subject="LLaVA-NeXT",
        known_from=f"{ABSTRACT}, {CODE}",
        differs="Sensitivity to dropping is tested as a declared trend over layers.",
    ),
    Work(
        name="Visual tokens withdrawal",
        authors="Lin et al. 2024",
        where="arXiv:2405.05803",
        cited=("2405.05803",),
        claim="In deep layers visual tokens are unnecessary: from some layer on all of them can be withdrawn.",
        evidence="More than 40 % of the computation saved over several tasks at the same performance; the layer is chosen by the divergence of the outputs.",
        subject="Several multimodal models and tasks",
        known_from=ABSTRACT,
        differs="The layer is found on discovery scenes, task by task, and bounded by 3/4 of the depth.",
    ),
    Work(
        name="Is token pruning solving the right problem?",
        authors="Wen et al. 2025",
        where="arXiv:2502.11501",
        cited=("2502.11501",),
        claim="Many methods that choose tokens do worse than choosing at random.",
        evidence="At 144 of 576 tokens random choice keeps 95.0 %, pooling 96.4 %, FastV 89.8 % and SparseVLM 93.5 % of the accuracy.",
        subject="LLaVA-1.5-7B",
        known_from=f"{ABSTRACT} (the claim); {SECONDARY} (the figures)",
        differs="Random, evenly spaced and pooled tokens are the references that every informed policy has to beat.",
    ),
    Work(
        name="FEATHER",
        authors="Endo et al. 2024",
        where="arXiv:2412.13180",
        cited=("2412.13180",),
        claim="Tokens kept early by attention lie at the bottom of the image, those at its top are lost: rotary positions bias early attention.",
        evidence="At a quarter kept, the tokens' mean height is 80.7 % of the image, 50 % being even.",
        subject="LLaVA-1.5-7B",
        known_from=f"{ABSTRACT} (where tokens are lost); {SECONDARY} (the figure and the cause)",
        differs="The bias is an effect with an interval, and so is its absence without rotary positions.",
    ),
    Work(
        name="LLaVA-KD",
        authors="Cai et al. 2024",
        where="arXiv:2410.16236",
        cited=("2410.16236",),
        claim="Distillation from a larger vision-language model lifts a small one.",
        evidence="Mean score 54.7 to 57.9 over five VQA benchmarks.",
        subject="A student of 0.5 billion parameters",
        known_from=f"{ABSTRACT} (the claim); {SECONDARY} (the figure)",
        differs="The student learns from the teacher's answers, several seeds, against as many more steps on the data it already had.",
    ),
    Work(
        name="mDPO",
        authors="Wang et al. 2024",
        where="arXiv:2406.11839",
        cited=("2406.11839",),
        claim="Preference optimisation of multimodal models can overlook the image; preferring the right image too repairs that.",
        evidence="Improvements, above all fewer hallucinations, on three benchmarks. No figure of theirs is used here.",
        subject="Two multimodal models of different size",
        known_from=ABSTRACT,
        differs="Whether a gain is the image's is tested by showing another scene's image.",
    ),
)


def tested(work, claims):
    """The claims, of some declared ones, whose ``source`` cites a work.

    Parameters
    ----------
    work : Work
    claims : iterable of vlm_core.stats.Claim

    Returns
    -------
    list of vlm_core.stats.Claim
        In the order given.
    """
    return [claim for claim in claims if work.cited_in(claim.source)]

"""What a run can say to the Checklist for Artificial Intelligence in Medical Imaging, and what it cannot.

CLAIM, 2024 update: Tejani et al., Radiology: Artificial Intelligence 2024; 6(4): e240300.
"""

from collections.abc import Mapping
from typing import Any

from ..settings import Settings

ITEMS = {
    1: "Identification as a study of AI methodology, and the technology used",
    2: "Summary of design, methods, results and conclusions",
    3: "Background, with the intended use and role of the AI approach",
    4: "Aims, objectives and hypotheses",
    5: "Prospective or retrospective study",
    6: "Study goal",
    7: "Data sources",
    8: "Inclusion and exclusion criteria",
    9: "Data pre-processing",
    10: "Selection of data subsets",
    11: "De-identification",
    12: "How missing data were handled",
    13: "Image acquisition protocol",
    14: "How the reference standard was obtained",
    15: "Why this reference standard",
    16: "Source of the reference standard's annotations",
    17: "Annotation of the test set",
    18: "Inter- and intrarater variability",
    19: "How data were assigned to partitions",
    20: "Level at which partitions are disjoint",
    21: "Intended sample size",
    22: "Description of the model",
    23: "Software libraries, frameworks and packages",
    24: "Initialization of the model's parameters",
    25: "Training approach",
    26: "How the final model was selected",
    27: "Ensembling",
    28: "Metrics of performance",
    29: "Measures of significance and uncertainty",
    30: "Robustness or sensitivity analysis",
    31: "Explainability or interpretability",
    32: "Evaluation on internal data",
    33: "Testing on external data",
    34: "Registration of a clinical trial",
    35: "Numbers of patients or examinations included and excluded",
    36: "Demographic and clinical characteristics in each partition",
    37: "Performance with measures of uncertainty",
    38: "Diagnostic performance and its precision",
    39: "Failure analysis of incorrect results",
    40: "Limitations",
    41: "Implications for practice, with intended use or clinical role",
    42: "Full protocol, or further technical details",
    43: "Availability of software, model and data",
    44: "Funding and other support, and the role of funders",
}


def answers(settings: Settings, record: Mapping[str, Any]) -> dict[int, str]:
    """Say by number of the item what the run knows; an item that is missing is open."""
    left_out = len(record["broken_images"])
    site = "A test part, kept apart from the start"
    found = {
        9: "Section Preprocessing",
        10: f"{settings.train_fraction:.0%} of the training part; nothing else was left out on purpose",
        12: f"{left_out} images that cannot be read were left out" if left_out else "No image was unreadable",
        19: "Section Split",
        20: f"{record['divided_groups']} groups (patient, where known, and exact copies) are in two parts",
        22: "Section Model; the layers are those of the architecture that is named there",
        23: "Section To do it again",
        24: f"{record['weights']['origin']}; new layers from seed {settings.seed}",
        25: "Section Training",
        26: f"The epoch with the highest {record['score']} on the validation part",
        27: "None",
        28: "Section Scores",
        29: "Percentile intervals of a bootstrap by group; no test of a hypothesis",
        32: site,
        35: "Section Data, in images and groups; what was excluded before is open",
        37: "Section Scores",
        39: "Section Mistakes",
        43: "The adapter and the command; a statement on the data is open",
    }
    if settings.test_data:
        del found[32]
        found[33] = f"The test is another site's: {settings.test_data}"
    if record["test"].get("operating"):
        found[38] = "Section Operating points"
    if "test_subgroups" in record:
        found[30] = "Section Subgroups; nothing else was varied"
    if record.get("mistakes") and not settings.no_figures:
        found[31] = "Grad-CAM beside the mistakes; not validated"
    return dict(sorted(found.items()))


def open_items(answered: Mapping[int, str]) -> dict[int, str]:
    """Give the items that a run cannot answer."""
    return {number: item for number, item in ITEMS.items() if number not in answered}

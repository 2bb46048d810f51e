"""A process of its own, where the trainer and medpeft cannot be imported: MONAI checks, runs and exports bundles.

python monai_alone.py SCHEMA BUNDLE:IMAGES:ANSWERS …
"""

import os
import sys
import warnings

ABSENT = ("medpeft", "trainer", "examples", "lightning", "pandas")


def check(schema, bundle, images, answers):
    """Do with a bundle what `python -m monai.bundle` does, but for ignite's loop around it."""
    import torch
    from monai.bundle import ConfigParser, ckpt_export, verify_metadata
    from monai.data import decollate_batch

    os.chdir(bundle)
    metadata, config = "configs/metadata.json", "configs/inference.json"
    verify_metadata(meta_file=metadata, filepath=schema)
    parser = ConfigParser()
    parser.read_config(config)
    parser.read_meta(metadata)
    parser["dataset_dir"], parser["output_dir"] = images, answers
    network, inferer, postprocessing = map(
        parser.get_parsed_content, ("network", "inferer", "postprocessing")
    )
    network.eval().load_state_dict(torch.load("models/model.pt", weights_only=True))
    found, paths = [], []
    for batch in parser.get_parsed_content("dataloader"):
        with torch.no_grad():
            outputs = inferer(inputs=batch["image"], network=network)
        for item in decollate_batch({"image": batch["image"], "pred": outputs}):
            found.append(postprocessing(item)["pred"])
            paths.append(item["image"].meta["filename_or_obj"])
    if "table" in parser:
        table = parser.get_parsed_content("table")
        table.save_batch(torch.stack(found), {"filename_or_obj": paths})
        table.finalize()
    shape = [1, 3, *parser["_meta_#network_data_format#inputs#image#spatial_shape"]]
    ckpt_export(
        "network_def",
        "models/model.ts",
        meta_file=metadata,
        config_file=config,
        use_trace=True,
        input_shape=shape,
    )
    inputs = torch.randn(2, *shape[1:])
    assert torch.allclose(torch.jit.load("models/model.ts")(inputs), network(inputs), atol=1e-5)


def main(schema, *wanted):
    sys.modules.update(dict.fromkeys(ABSENT))
    # The folder that the process is in, which changes, as `python -m` has it: there lies a bundle's `scripts`.
    sys.path[0] = ""
    warnings.simplefilter("ignore")
    for bundle_images_answers in wanted:
        check(schema, *bundle_images_answers.split(":"))
        # Each bundle brings scripts of its own.
        for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
            del sys.modules[name]
    print("ALL CHECKED")


if __name__ == "__main__":
    main(*sys.argv[1:])

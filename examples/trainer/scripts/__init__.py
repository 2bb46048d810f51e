"""What a bundle of MONAI takes along: no file here imports anything of the rest of the trainer."""

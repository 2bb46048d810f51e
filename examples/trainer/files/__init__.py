"""What is in files: pictures, DICOM, NIfTI and masks as pixels."""

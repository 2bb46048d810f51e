"""DICOM files for tests, written by pydicom."""

import pytest


def dicom(path, pixels, **header):
    """Write one file; the header's names are DICOM's keywords."""
    pydicom = pytest.importorskip("pydicom")
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID = pydicom.uid.generate_uid()
    found.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    bits = 8 * pixels.dtype.itemsize
    plain = {
        "Rows": pixels.shape[-2] if pixels.ndim < 3 or pixels.shape[-1] != 3 else pixels.shape[0],
        "Columns": pixels.shape[-1] if pixels.ndim < 3 or pixels.shape[-1] != 3 else pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    for name, value in {**plain, **header}.items():
        setattr(found, name, value)
    found.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save_as(path, enforce_file_format=True)
    return path

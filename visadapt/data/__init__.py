"""Bundled weights and samples, and loaders of images and texts."""

from visadapt.data.bundled import path as path
from visadapt.data.images import ImageSet as ImageSet
from visadapt.data.images import ImageSplit as ImageSplit
from visadapt.data.images import image_files as image_files
from visadapt.data.images import load_images as load_images
from visadapt.data.images import load_squares as load_squares
from visadapt.data.images import read_images as read_images
from visadapt.data.lazy_images import ImageFiles as ImageFiles
from visadapt.data.splits import renumbered as renumbered
from visadapt.data.text import TextSet as TextSet
from visadapt.data.text import TextSplit as TextSplit
from visadapt.data.text import load_text as load_text
from visadapt.data.text_rows import read_texts as read_texts
from visadapt.data.tokenizers import minilm_path as minilm_path
from visadapt.data.tokenizers import tokenizer_of as tokenizer_of
from visadapt.data.transforms import augment as augment
from visadapt.data.transforms import normalize as normalize
from visadapt.data.weights import dequantise as dequantise
from visadapt.data.weights import resnet50 as resnet50

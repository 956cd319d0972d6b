"""COCO 2017 instances with halodet's loaders, which skip bad images and resume exactly."""

from halodet.data import ResumableTrainLoader, RobustDatasetMapper, SkipTrackingLoader, load_train_dataset
from halodet.data import build_detection_test_loader as build_test_loader
from halodet.data.transforms import ResizeShortestEdge
from halodet.evaluation.coco import RobustCOCOEvaluator

from detectron2.config import LazyCall as L
from detectron2.data import get_detection_dataset_dicts
from detectron2.data import transforms as T
from omegaconf import OmegaConf

dataloader = OmegaConf.create()

dataloader.train = L(SkipTrackingLoader)(
    loader=L(ResumableTrainLoader)(
        dataset=L(load_train_dataset)(
            names="coco_2017_train",
            need_mask="${..mapper.use_instance_mask}",
            mask_format="${..mapper.instance_mask_format}",
        ),
        mapper=L(RobustDatasetMapper)(
            is_train=True,
            augmentations=[
                L(ResizeShortestEdge)(
                    short_edge_length=(640, 672, 704, 736, 768, 800), max_size=1333, sample_style="choice"
                ),
                L(T.RandomFlip)(),
            ],
            image_format="BGR",
            use_instance_mask=True,
            instance_mask_format="polygon",
        ),
        total_batch_size=16,
        num_workers=4,
        seed="${train.seed}",
    )
)

dataloader.test = L(build_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
    mapper=L(RobustDatasetMapper)(
        is_train=False,
        augmentations=[L(ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.loader.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(RobustCOCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    output_dir="${train.output_dir}/inference",
    report_dir="${train.output_dir}",
    default_tasks=("bbox", "segm"),
    use_fast_impl=False,
)

"""Models of libraries that mimicut does not build by name, each as its own users build it, with random weights.

`build(name)` is the teacher function: `mimicut.load_teacher("benchmarks.zoo.libraries:build", model_kwargs={"name":
"ultralytics:yolov8n"})`. The libraries are not needed for anything else: `pip install 'mimicut[zoo]'`.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import nn

Built = tuple[nn.Module, dict[str, Any]]
BUILDER = "benchmarks.zoo.libraries:build"
# The part of a name before its colon -> the module that must be installed, and the package that brings it.
LIBRARIES = {
    "smp": ("segmentation_models_pytorch", "segmentation-models-pytorch"),
    "ultralytics": ("ultralytics", "ultralytics"),
    "monai": ("monai", "monai"),
    "open_clip": ("open_clip", "open-clip-torch"),
    "spandrel": ("spandrel", "spandrel"),
    "doctr": ("doctr", "python-doctr"),
    "timm_encoder": ("timm", "timm"),
    "timm_features": ("timm", "timm"),
    "hf_encoder": ("transformers", "transformers"),
}
_TINY = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192}


def missing(spec: str) -> str | None:
    """The package that must be installed before the model of this name can be built; None if nothing is missing."""
    library = spec.partition(":")[0]
    if library not in LIBRARIES:
        return None
    module, package = LIBRARIES[library]
    return None if importlib.util.find_spec(module) else package


def build(name: str) -> Built:
    """Build the model and the size of its images.

    Args:
        name: A key of MODELS.
    """
    return MODELS[name]()


def _sized(size: int, channels: int = 3, **fields: Any) -> dict[str, Any]:
    grey = {"mean": (0,) * channels, "std": (1,) * channels} if channels != 3 else {}
    return {"input_size": (channels, size, size), **grey, **fields}


def _smp(arch: str, encoder: str = "resnet18", size: int = 64, **kwargs: Any) -> Callable[[], Built]:
    def make() -> Built:
        import segmentation_models_pytorch as smp

        return getattr(smp, arch)(encoder, encoder_weights=None, classes=3, **kwargs), _sized(size)

    return make


def _yolo(config: str, size: int = 128, classes: int = 5) -> Callable[[], Built]:
    def make() -> Built:
        from ultralytics.cfg import get_cfg
        from ultralytics.nn import tasks

        loaded = tasks.yaml_model_load(config)
        task = "detect" if "rtdetr" in config else tasks.guess_model_task(loaded)
        kind = {
            "detect": tasks.DetectionModel,
            "segment": tasks.SegmentationModel,
            "pose": tasks.PoseModel,
            "obb": tasks.OBBModel,
            "classify": tasks.ClassificationModel,
        }[task]
        if "rtdetr" in config:
            kind = tasks.RTDETRDetectionModel
        model = kind(config, nc=classes, verbose=False)
        model.args = get_cfg()
        return model, _sized(size, mean=(0, 0, 0), std=(1, 1, 1))

    return make


def _monai(arch: str, size: int = 64, **kwargs: Any) -> Callable[[], Built]:
    def make() -> Built:
        from monai.networks import nets

        return getattr(nets, arch)(**kwargs), _sized(size, kwargs.get("in_channels", 3))

    return make


def _spandrel(family: str, module: str, arch: str, size: int = 32, **kwargs: Any) -> Callable[[], Built]:
    def make() -> Built:
        place = importlib.import_module(f"spandrel.architectures.{family}.__arch.{module}")
        return getattr(place, arch)(**kwargs), _sized(size, mean=(0, 0, 0), std=(1, 1, 1))

    return make


def _doctr(arch: str, size: tuple[int, int, int], group: str) -> Callable[[], Built]:
    def make() -> Built:
        models = importlib.import_module(f"doctr.models.{group}")
        return getattr(models, arch)(pretrained=False, pretrained_backbone=False), {"input_size": size}

    return make


def _timm(name: str, size: int, **kwargs: Any) -> Callable[[], Built]:
    def make() -> Built:
        import timm

        return timm.create_model(name, pretrained=False, **kwargs), _sized(size)

    return make


def _hf(cls: str, size: int, channels: int = 3, **kwargs: Any) -> Callable[[], Built]:
    def make() -> Built:
        import transformers

        kind = getattr(transformers, cls)
        return kind(kind.config_class(**kwargs)), _sized(size, channels)

    return make


_VIT = {"num_classes": 0, "embed_dim": 96, "depth": 3, "num_heads": 3}
MODELS: dict[str, Callable[[], Built]] = {
    "smp:Unet": _smp("Unet"),
    "smp:UnetPlusPlus": _smp("UnetPlusPlus"),
    "smp:MAnet": _smp("MAnet"),
    "smp:Linknet": _smp("Linknet"),
    "smp:FPN": _smp("FPN", "mobilenet_v2"),
    "smp:PSPNet": _smp("PSPNet"),
    "smp:PAN": _smp("PAN", size=128),
    "smp:DeepLabV3": _smp("DeepLabV3"),
    "smp:DeepLabV3Plus": _smp("DeepLabV3Plus"),
    "smp:UPerNet": _smp("UPerNet"),
    "smp:Segformer": _smp("Segformer", "mit_b0"),
    "smp:DPT": _smp("DPT", "tu-vit_tiny_patch16_224", 224),
    "smp:Unet_with_classes": _smp("Unet", aux_params={"classes": 4, "pooling": "avg"}),
    "ultralytics:yolov3-tiny": _yolo("yolov3-tiny.yaml"),
    "ultralytics:yolov5n": _yolo("yolov5n.yaml"),
    "ultralytics:yolov6n": _yolo("yolov6n.yaml"),
    "ultralytics:yolov8n": _yolo("yolov8n.yaml"),
    "ultralytics:yolov8n-seg": _yolo("yolov8n-seg.yaml"),
    "ultralytics:yolov8n-pose": _yolo("yolov8n-pose.yaml"),
    "ultralytics:yolov8n-cls": _yolo("yolov8n-cls.yaml"),
    "ultralytics:yolov9t": _yolo("yolov9t.yaml"),
    "ultralytics:yolov10n": _yolo("yolov10n.yaml"),
    "ultralytics:yolo11n": _yolo("yolo11n.yaml"),
    "ultralytics:yolo11n-obb": _yolo("yolo11n-obb.yaml"),
    "ultralytics:yolo12n": _yolo("yolo12n.yaml"),
    "ultralytics:yolo26n": _yolo("yolo26n.yaml"),
    "ultralytics:yolov8n-rtdetr": _yolo("yolov8n-rtdetr.yaml"),
    "timm_encoder:vit_base_patch32_clip_224": _timm("vit_base_patch32_clip_224", 224, **_VIT),
    "timm_encoder:vit_base_patch16_siglip_224": _timm("vit_base_patch16_siglip_224", 224, **_VIT),
    "timm_encoder:vit_small_patch14_reg4_dinov2": _timm("vit_small_patch14_reg4_dinov2", 224, img_size=224, **_VIT),
    "timm_encoder:vit_small_patch16_dinov3": _timm("vit_small_patch16_dinov3", 224, **_VIT),
    "timm_encoder:samvit_base_patch16": _timm("samvit_base_patch16", 256, img_size=256, **_VIT),
    "timm_encoder:sam2_hiera_tiny": _timm("sam2_hiera_tiny", 224, num_classes=0),
    "timm_encoder:eva02_tiny_patch14_224": _timm("eva02_tiny_patch14_224", 224, num_classes=0),
    "timm_encoder:convnext_atto": _timm("convnext_atto", 64, num_classes=0),
    "timm_encoder:tokens": _timm("vit_tiny_patch16_224", 224, num_classes=0, global_pool=""),
    "timm_features:resnet18": _timm("resnet18", 64, features_only=True),
    "timm_features:vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", 224, features_only=True),
    "hf_encoder:CLIPVisionModel": _hf("CLIPVisionModel", 64, image_size=64, patch_size=16, **_TINY),
    "hf_encoder:CLIPVisionModelWithProjection": _hf(
        "CLIPVisionModelWithProjection", 64, image_size=64, patch_size=16, projection_dim=48, **_TINY
    ),
    "hf_encoder:SiglipVisionModel": _hf("SiglipVisionModel", 64, image_size=64, patch_size=16, **_TINY),
    "hf_encoder:Dinov2Model": _hf("Dinov2Model", 56, image_size=56, patch_size=14, **_TINY),
    "hf_encoder:Dinov2WithRegistersModel": _hf("Dinov2WithRegistersModel", 56, image_size=56, patch_size=14, **_TINY),
    "hf_encoder:DINOv3ViTModel": _hf("DINOv3ViTModel", 64, image_size=64, patch_size=16, **_TINY),
    "hf_encoder:SamVisionModel": _hf(
        "SamVisionModel", 128, image_size=128, patch_size=16, hidden_size=96, num_hidden_layers=3,
        num_attention_heads=3, output_channels=32, mlp_dim=192, window_size=4, global_attn_indexes=[2],
    ),
    "hf_encoder:Sam2VisionModel": _hf("Sam2VisionModel", 256),
    "hf_encoder:DPTForDepthEstimation": _hf(
        "DPTForDepthEstimation", 64, image_size=64, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=32, is_hybrid=False, **_TINY | {"num_hidden_layers": 4},
    ),
    "hf_encoder:DepthAnythingForDepthEstimation": _hf(
        "DepthAnythingForDepthEstimation", 56, backbone_config=dict(
            model_type="dinov2", image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
            apply_layernorm=True, **_TINY | {"num_hidden_layers": 4}
        ), reassemble_hidden_size=96, neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=32,
    ),
    "hf_encoder:GLPNForDepthEstimation": _hf("GLPNForDepthEstimation", 64),
    "hf_encoder:VitMatteForImageMatting": _hf(
        "VitMatteForImageMatting", 64, 4, backbone_config=dict(
            model_type="vitdet", image_size=64, patch_size=16, num_channels=4, out_features=["stage3"],
            hidden_size=96, num_hidden_layers=3, num_attention_heads=3,
        ), hidden_size=96, fusion_hidden_sizes=[64, 32, 16, 8],
    ),
    "hf_encoder:DetrForObjectDetection": _hf(
        "DetrForObjectDetection", 64, backbone_config={"model_type": "resnet", "out_features": ["stage4"]},
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=20,
        encoder_attention_heads=4, decoder_attention_heads=4,
    ),
    "hf_encoder:YolosForObjectDetection": _hf(
        "YolosForObjectDetection", 64, image_size=[64, 64], num_detection_tokens=20, **_TINY
    ),
    "hf_encoder:RTDetrForObjectDetection": _hf("RTDetrForObjectDetection", 128, num_queries=20, decoder_layers=2),
    "hf_encoder:Swin2SRForImageSuperResolution": _hf(
        "Swin2SRForImageSuperResolution", 64, image_size=64, embed_dim=24, depths=[2, 2], num_heads=[2, 2],
        window_size=8,
    ),
    "hf_encoder:UperNetForSemanticSegmentation": _hf(
        "UperNetForSemanticSegmentation", 64, backbone_config=dict(
            model_type="convnext", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64],
            out_features=["stage1", "stage2", "stage3", "stage4"]), hidden_size=32, auxiliary_in_channels=48,
            auxiliary_channels=16,
    ),
    "monai:UNet": _monai("UNet", spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2)),
    "monai:BasicUNet": _monai("BasicUNet", spatial_dims=2, in_channels=1, out_channels=2),
    "monai:SegResNet": _monai("SegResNet", spatial_dims=2, in_channels=1, out_channels=2),
    "monai:DynUNet": _monai(
        "DynUNet", spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
    ),
    "monai:AttentionUnet": _monai(
        "AttentionUnet", spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2)
    ),
    "monai:SwinUNETR": _monai("SwinUNETR", spatial_dims=2, in_channels=1, out_channels=2, feature_size=12),
    "monai:UNETR": _monai(
        "UNETR", spatial_dims=2, in_channels=1, out_channels=2, img_size=64, feature_size=8, hidden_size=96,
        mlp_dim=192, num_heads=4,
    ),
    "monai:DenseNet121": _monai("DenseNet121", spatial_dims=2, in_channels=1, out_channels=3),
    "spandrel:SRVGGNetCompact": _spandrel("Compact", "SRVGG", "SRVGGNetCompact", num_feat=16, num_conv=4, upscale=2),
    "spandrel:RRDBNet": _spandrel("ESRGAN", "RRDB", "RRDBNet", num_filters=16, num_blocks=2),
    "spandrel:SwinIR": _spandrel(
        "SwinIR", "SwinIR", "SwinIR", img_size=32, embed_dim=24, depths=(2, 2), num_heads=(2, 2), window_size=8,
        upscale=2, upsampler="pixelshuffle",
    ),
    "spandrel:NAFNet": _spandrel(
        "NAFNet", "NAFNet_arch", "NAFNet", width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]
    ),
    "spandrel:DnCNN": _spandrel("DnCNN", "network_dncnn", "DnCNN", in_nc=3, out_nc=3, nc=16, nb=5),
    "spandrel:DRUNet": _spandrel("DRUNet", "network_unet", "DRUNet", in_nc=3, out_nc=3, nc=[16, 32, 32, 64], nb=1),
    "spandrel:RCAN": _spandrel("RCAN", "rcan_arch", "RCAN", n_feats=16, n_resgroups=2, n_resblocks=2),
    "spandrel:SPAN": _spandrel("SPAN", "span", "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=16),
    "doctr:crnn_mobilenet_v3_small": _doctr("crnn_mobilenet_v3_small", (3, 32, 128), "recognition"),
    "doctr:vitstr_small": _doctr("vitstr_small", (3, 32, 128), "recognition"),
    "doctr:db_mobilenet_v3_large": _doctr("db_mobilenet_v3_large", (3, 128, 128), "detection"),
    "doctr:linknet_resnet18": _doctr("linknet_resnet18", (3, 128, 128), "detection"),
    "doctr:fast_tiny": _doctr("fast_tiny", (3, 128, 128), "detection"),
}  # fmt: skip

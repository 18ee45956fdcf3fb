"""Options of the command line whose setting stands in a table, by the option's name."""

NESTED_OPTIONS = {
    "device": "loading.device",
    "device_map": "loading.device_map",
    "quantization": "loading.quantization",
    "trust_remote_code": "loading.trust_remote_code",
    "batch_size": "batching.rows",
}

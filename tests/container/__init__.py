"""The real Dockerfile, built and run without a container engine: buildah builds, namespaces and chroot run."""

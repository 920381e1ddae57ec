//! Compiles the .proto files with protox, so that no `protoc` is needed to build.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    use prost::Message;

    const FILES: [&str; 3] = [
        "proto/quire/v1/generation.proto",
        "proto/smg/grpc/common.proto",
        "proto/vllm/grpc/engine.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    // Served by gRPC reflection.
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}

//! Compiles the messages, without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        ["log.proto", "peer.proto", "registry.proto", "snapshot.proto"],
        ["proto"],
    )?;
    tonic_prost_build::configure()
        .bytes(".")
        // A message may say that it has millions of them, in two bytes each.
        .boxed(".registry.v1.Asked.what.request")
        .boxed(".registry.v1.Asked.what.watch")
        .boxed(".registry.v1.Asked.what.once_gone")
        .compile_fds(descriptors)?;
    Ok(())
}

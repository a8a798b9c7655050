//! Signed marks: manifests of the Coalition for Content Provenance and Authenticity (C2PA 2.2), which say in a way that
//! cannot be forged that a picture was generated, by which program, and by whom.

#[cfg(feature = "c2pa")]
use crate::{Error, ErrorKind, Result, Subject};
#[cfg(feature = "c2pa")]
use c2pa::{BoxedSigner, Builder, BuilderIntent, Context, DigitalSourceType, Reader, SigningAlg, ValidationState};
#[cfg(feature = "c2pa")]
use std::{io::Cursor, path::Path};

/// A certificate of the user's and its key, which sign pictures.
#[cfg(feature = "c2pa")]
pub struct Signer(BoxedSigner);

#[cfg(feature = "c2pa")]
impl Signer {
    /// Reads a chain of X.509 certificates (PEM, the signer's own first, without the root) and the private key of the
    /// first one (PEM, PKCS #8: P-256, P-384, P-521, Ed25519 or RSA). The C2PA's rules for certificates hold: key usage
    /// `digitalSignature`, and extended key usage `emailProtection` or one of the C2PA's own. Nothing is fetched from
    /// anywhere: signatures carry no time stamp, and no list of trusted roots is asked.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] or [`crate::ErrorKind::Io`] for files that cannot be read, and
    /// [`crate::ErrorKind::Invalid`] for a certificate or a key that cannot sign pictures.
    pub fn open(certificates: &Path, key: &Path) -> Result<Self> {
        let read = |path: &Path| std::fs::read(path).map_err(Error::io("read", path));
        let (chain, private) = (read(certificates)?, read(key)?);
        let refused = |path: &Path, problem: String| Error::new(ErrorKind::Invalid, path, problem);
        let algorithms =
            [SigningAlg::Es256, SigningAlg::Es384, SigningAlg::Es512, SigningAlg::Ed25519, SigningAlg::Ps256];
        let signer =
            algorithms.into_iter().find_map(|kind| c2pa::create_signer::from_keys(&chain, &private, kind, None).ok());
        let signer = signer.map(Signer).ok_or_else(|| {
            refused(key, "is no private key that signs for the certificate".into())
                .advise("give PEM files: the key as PKCS #8 (P-256, P-384, P-521, Ed25519 or RSA)")
        })?;
        // A key of another certificate, or a certificate that the C2PA does not allow, is found before any picture is.
        let picture = crate::Picture { width: 1, height: 1, rgb: vec![0; 3] };
        let signed = signer.sign(&picture.to_png(&[])?, "image/png");
        let problem = match signed
            .map(|signed| Reader::from_context(Context::new()).with_stream("image/png", Cursor::new(signed)))
        {
            Ok(Ok(read)) if read.validation_state() != ValidationState::Invalid => return Ok(signer),
            Ok(Ok(read)) => {
                let found = read.validation_results().and_then(|results| results.active_manifest());
                let codes = found.iter().flat_map(|found| found.failure()).map(|status| status.code());
                format!("signatures with it do not hold: {}", codes.collect::<Vec<_>>().join(", "))
            }
            Ok(Err(error)) => format!("signatures with it cannot be read: {error}"),
            Err(error) => error.problem().into(),
        };
        Err(refused(certificates, problem)
            .advise("the certificate must be the key's, valid now, with emailProtection as extended key usage"))
    }

    /// Signs the bytes of a picture file with this media type: `image/png`, `image/jpeg` or `image/webp`. Two
    /// signatures of the same file differ.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if the file cannot be signed.
    pub fn sign(&self, file: &[u8], media_type: &str) -> Result<Vec<u8>> {
        let refused = |problem: c2pa::Error| {
            Error::new(ErrorKind::Invalid, Subject::Run, format!("the picture cannot be signed: {problem}"))
        };
        let definition = serde_json::json!({
            "claim_generator_info": [{"name": "respodiff", "version": env!("CARGO_PKG_VERSION")}],
        });
        let mut builder = Builder::from_context(Context::new()).with_definition(definition).map_err(refused)?;
        builder.set_intent(BuilderIntent::Create(DigitalSourceType::TrainedAlgorithmicMedia));
        let mut signed = Cursor::new(Vec::new());
        builder.sign(&*self.0, media_type, &mut Cursor::new(file), &mut signed).map_err(refused)?;
        Ok(signed.into_inner())
    }
}

/// A PNG file without the chunk that holds a C2PA manifest. Bytes that are no PNG file stay as they are.
#[cfg(feature = "cli")]
pub(crate) fn unsigned(png: &[u8]) -> Vec<u8> {
    const SIGNATURE: usize = 8;
    let (mut kept, mut rest) = png.split_at(png.len().min(SIGNATURE));
    let mut bytes = kept.to_vec();
    // A chunk has a length, a type, its data, and a checksum.
    while let Some((length, _)) = rest.split_first_chunk() {
        let length = (u32::from_be_bytes(*length) as usize).saturating_add(12).min(rest.len());
        (kept, rest) = rest.split_at(length);
        if kept.get(4..8) != Some(b"caBX") {
            bytes.extend_from_slice(kept);
        }
    }
    bytes.extend_from_slice(rest);
    bytes
}

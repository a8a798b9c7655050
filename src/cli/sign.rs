//! The flags by which pictures are signed.

use crate::Result;
#[cfg(feature = "c2pa")]
use crate::image::Signer;
#[cfg(feature = "c2pa")]
use std::path::PathBuf;

/// The choice of a certificate. Without the feature `c2pa` there are no such flags.
#[derive(clap::Args)]
#[group(id = "signing")]
pub(super) struct Flags {
    /// Sign every picture (C2PA) with this chain of certificates, a PEM file
    #[cfg(feature = "c2pa")]
    #[arg(long, value_name = "FILE", requires = "sign_key")]
    sign: Option<PathBuf>,
    /// The private key of the chain's first certificate, a PEM file
    #[cfg(feature = "c2pa")]
    #[arg(long, value_name = "FILE", requires = "sign")]
    sign_key: Option<PathBuf>,
}

/// Signs pictures, if a certificate was given.
pub(super) struct Signing(#[cfg(feature = "c2pa")] Option<Signer>);

impl Flags {
    /// Reads the certificate and its key, and tries them.
    pub(super) fn open(&self) -> Result<Signing> {
        Ok(Signing(
            #[cfg(feature = "c2pa")]
            self.sign.as_ref().zip(self.sign_key.as_ref()).map(|(chain, key)| Signer::open(chain, key)).transpose()?,
        ))
    }
}

impl Signing {
    /// The bytes of a picture file with this media type, signed.
    #[cfg_attr(not(feature = "c2pa"), expect(clippy::unused_self, clippy::unnecessary_wraps))]
    pub(super) fn sign(&self, file: Vec<u8>, _media_type: &str) -> Result<Vec<u8>> {
        #[cfg(feature = "c2pa")]
        if let Some(signer) = &self.0 {
            return signer.sign(&file, _media_type);
        }
        Ok(file)
    }
}

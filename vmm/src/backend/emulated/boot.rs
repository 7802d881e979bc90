//! What a guest test finds in memory when it starts: its image, the parameter page, its input.

use mapgpa_abi::layout::{INPUT, MAX_VCPUS, STACKS, stack_top};
use mapgpa_abi::{PAGE_SIZE, params};

use super::image::{self, Image, ImageError, Tdcalls};
use super::memory::{Ram, SetupError};
use crate::backend::Setup;
use crate::pagemap::Pages;

/// Loads the image of `setup`, its parameters and `input` into `ram`.
///
/// # Errors
/// The image is unusable, or `input` is longer than the room for it.
pub(in crate::backend) fn load(
    setup: &Setup<'_>,
    input: &[u8],
    ram: &Ram,
    tdcalls: Tdcalls,
) -> Result<Image, ImageError> {
    if input.len() as u64 > STACKS - INPUT {
        return Err(SetupError::Outside { gpa: INPUT, size: input.len() }.into());
    }
    let image = image::load(setup.image, ram, tdcalls)?;
    // The pages that every guest touches, at once.
    for vcpu in 0..setup.params.vcpus.min(MAX_VCPUS) {
        ram.populate(Pages::of_bytes(stack_top(vcpu) - PAGE_SIZE, PAGE_SIZE));
    }
    ram.write(params::GPA, &setup.params.to_bytes())?;
    ram.write(INPUT, input)?;
    Ok(image)
}
